"""Images to views: cropping, color and multi-crop in batches on the device the images are on."""
