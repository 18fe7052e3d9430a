"""What a user can get wrong."""


class Mistake(ValueError):
    """A mistake of the user's, told in a sentence that says what to change. A command ends with it as one line and exit
    code 2; an actor's ends the run. A library's own ValueError is none, and keeps its traceback."""
