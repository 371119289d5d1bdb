"""Ways to choose the pairs to drop, behind one interface, so that they can be compared fairly.

`marginal` gives a profile that is better than MoDES at one skip rate; the others are there to measure.
ACE (arXiv 2609.05228) is missing: what is known of it (method notes 4.2) does not define its two scores.
"""

from modes_fx.policies.equal_cost import marginal as marginal
from modes_fx.policies.policy import Bench as Bench
from modes_fx.policies.policy import Policy as Policy
from modes_fx.policies.policy import Tuned as Tuned
from modes_fx.policies.policy import tune as tune
from modes_fx.policies.reduce_k import ReducedK as ReducedK
from modes_fx.policies.reduce_k import keep_per_block as keep_per_block
from modes_fx.policies.reduce_k import reduce_k as reduce_k
from modes_fx.policies.reduce_k import reduce_k_rule as reduce_k_rule
