"""Models on many devices, by the engines that exist.

`processes` is about programs that run in several processes: what they do in step, and for how long they wait.
"""

from tether.distribution.processes import gathering, time_limit

__all__ = ["gathering", "time_limit"]
