"""Types that carry their range, so that a signature is also the schema of its configuration.

`espalier.config.check` reads them before anything is built: `data.batch_size=0` ends in one line, not in a traceback.
"""

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

INT32 = 2**31 - 1  # no size, count or position of ours is larger
INT64 = 2**63 - 1  # what a checkpoint and torch can hold

Count = Annotated[int, Ge(1), Le(INT32)]  # at least one
Index = Annotated[int, Ge(0), Le(INT32)]  # zero or more
Limit = Annotated[int, Ge(-1)]  # -1 for no limit
Positive = Annotated[float, Gt(0), Lt(math.inf)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]  # a part of a whole, both ends allowed
Rate = Annotated[float, Ge(0), Lt(1)]  # dropout, momentum, sparsity: 1 would leave nothing
