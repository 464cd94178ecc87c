"""Models on many devices, by the engines that exist: Tether says how what it stores is to lie there.

A stored weight has one layout, on its own axes. Every use's layout, and that of every part of a form, follows from it
through the expressions. `layouts` hands the result to `keras.distribution` as a layout map.
"""

from tether.distribution.layouts import layout_map

__all__ = ["layout_map"]
