"""Images to views: cropping, colour and multi-crop in batches on the device the images are on."""
