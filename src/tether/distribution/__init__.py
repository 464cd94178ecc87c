"""Models on many devices, by the engines that exist: Tether says how what it stores is to lie there.

A stored weight has one layout, on its own axes. Every use's layout, and that of every part of a form, follows from it
through the expressions. `layouts` hands the result to `keras.distribution` as a layout map. `processes` is about
programs that run in several processes: what they do in step, and for how long they wait.
"""

from tether.distribution.layouts import layout_map
from tether.distribution.processes import gathering, time_limit

__all__ = ["gathering", "layout_map", "time_limit"]
