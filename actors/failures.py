"""What goes wrong with actors, and is no mistake of the user's."""


class ActorFailed(RuntimeError):
    """An actor died, or raised an error that is no mistake of the user's."""


class ActorDied(ActorFailed):
    """An actor died."""


class Lost(ActorFailed):
    """What a call needed, or made, has gone with its node."""


class DeadlinePassed(TimeoutError):
    """A wait took longer than its deadline."""


class Broken(RuntimeError):
    """Raised by an actor that cannot work any more, because something that it depends on has died. It counts as dead
    itself."""


class TransferFailed(RuntimeError):
    """Weights that were sent from the learner's process to engines did not arrive at all of them. The group in which
    they were sent is gone, and engines that had begun to receive are of no use; the learner goes on."""
