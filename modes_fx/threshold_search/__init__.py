"""The thresholds that reach a target at the least KL.

search     what to call, and one search from first pass to profile
targets    what is to be reached: skip rates, a KL budget, floors of accuracy
points     what was measured, and which points no other one beats
methods    where to measure next: guided, along the paper's staircase, or everywhere
grid       thresholds to try, and the skip rate that a recorded pass predicts for them
surface    a smooth surface through what was measured, to choose the next place
journal    what has been measured, in a file that lets a killed run go on
"""
