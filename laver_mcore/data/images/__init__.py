"""Files -> pixels, equal to the published processors'.

source.py          where an image's encoded bytes lie
decode.py          encoded bytes -> RGB on Pillow, the reference
processors.py      RGB -> the tower's input at fixed resolution; native.py at native resolution
pixel_settings.py  the numbers of a preprocessor_config.json
wanted.py          an image that is wanted, and what every backend does to one
backends.py        Pillow, torch and DALI on CPU; gpu_backend.py on a GPU; dali.py is DALI itself
"""
