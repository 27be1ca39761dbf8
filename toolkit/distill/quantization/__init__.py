"""Train a student on with rounded weights and activations. Imports training and below, of distill."""
