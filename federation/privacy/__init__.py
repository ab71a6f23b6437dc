"""Differential privacy: the accountant, privacy of hospitals, privacy of patients."""
