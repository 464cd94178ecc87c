"""How `inputs · expression` is computed: the weight built first, or its parts applied one after another.

Sums of products of stored weights are applied by plan where that is cheaper, by a cost model that knows
the shapes of the call, what trains and the machine. `explain` shows a plan, `force` takes another one,
`cached` keeps built weights between calls.
"""

from tether.planning.control import Explanation, cached, explain, force

__all__ = ["Explanation", "cached", "explain", "force"]
