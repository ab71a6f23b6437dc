"""A hospital's faults: the sentence for its own terminal, and the code for the server."""

from common import MedFLError
from federation.protocol.messages import Failure


class HospitalError(MedFLError):
    """A fault with a code, which is all that the server learns about it; the sentence stays here.

    of: the node of another hospital whose shares are at fault.
    """

    def __init__(self, failure: Failure, sentence: str, of: str | None = None):
        super().__init__(sentence)
        self.failure, self.of = failure, of
