"""What ends a run that is not a mistake of the user's."""


class ActorFailed(RuntimeError):
    """An actor died, or raised an error that is no mistake of the user's."""


class DeadlinePassed(TimeoutError):
    """A wait took longer than its deadline."""
