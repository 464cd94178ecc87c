"""What a weight is: stored weights, arguments and constants, and the expressions made of them.

`Weight` owns storage and nothing else does. An `Expression` is a value over weights; its program
(`expression.program`) is the one list that evaluation, comparison, notation, files and planning walk.
This package knows no layer that uses a weight.
"""

from tether.weights import algebra, codec, evaluation, integers, operators
from tether.weights.expression import Expression, Node, StatefulNode, Term
from tether.weights.identity import sharing
from tether.weights.leaves import Argument, Constant, bind
from tether.weights.storage import Use
from tether.weights.weight import Weight

_WAYS = (codec, evaluation, operators, algebra, integers)
"""What an expression is written, computed and changed by: imported, they provide it."""

__all__ = ["Argument", "Constant", "Expression", "Node", "StatefulNode", "Term", "Use", "Weight", "bind", "sharing"]
