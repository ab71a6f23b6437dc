"""Figures about a model: metrics, scores of patients, comparisons, pictures."""
