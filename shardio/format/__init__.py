"""How bytes lie: codecs, the layout of arrays in chunks and Zarr shards, and who reads them.

Paths and URLs come in; bytes, decoded boxes and small arrays go out. Nothing here knows what a field means.
"""
