"""Make, check and apply the classifier over teacher class centres. Imports models and config, of distill."""
