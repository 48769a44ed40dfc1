"""Rasters: images of any number of channels, 8 to 32 bits a value and any size, read with rasterio by windows."""
