"""Networks trained by recipes: data, models, training, sweeps."""
