"""Reading and writing weights: own checkpoints, timm, DINO."""
