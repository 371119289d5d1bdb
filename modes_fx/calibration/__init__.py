"""alpha: how much each MoE block matters.

calibrate      what to call: what is looked at first, the choice of method, the profile
alpha_exact    by dropping a block's routed experts, and `prefix`: only what that can change runs again
alpha_taylor   estimated from one forward and one backward pass
weight_scale   a routed scaling factor that a model has folded into its routing weights
state          what has been measured, in a file that lets a killed run go on
distributed    one calibration over several processes
"""
