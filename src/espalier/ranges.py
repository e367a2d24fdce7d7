"""Types that carry their range, so that a signature is also the schema of its configuration.

`espalier.targets.check` reads them before anything is built: `data.batch_size=0` ends in one line, not in a traceback.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(1)]  # at least one
Index = Annotated[int, Ge(0)]  # zero or more
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]  # a part of a whole, both ends allowed
Rate = Annotated[float, Ge(0), Lt(1)]  # dropout, momentum, sparsity: 1 would leave nothing
