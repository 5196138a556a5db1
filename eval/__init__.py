"""How a pair is judged: against causal ground truth, beside text-only adversaries and baselines; it is nla.eval."""
