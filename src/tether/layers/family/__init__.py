"""A layer that is made from others: what a child takes from its parent, and what a class adds to its base.

`inherit` ties a child to what `named` finds in its parent, `fill` makes start values of another size, `extend` is the
decorator of a class with more weights than its base, `call` computes weights for one call, `route` chooses one of
several for each call, example or token.
"""
