"""Published corpora -> prepared tar shards: strictly decoded, upright, 8 bits, shuffled once, hashed.

transcode.py  encoded image   -> JPEG or PNG that every reader decodes alike
record.py     record of a set -> one prepared sample
convert.py    a whole set     -> shards, rejects.jsonl, manifest.json; goes on where it was killed
energon.py    manifest        -> .nv-meta, so that Megatron Energon reads the shards too
survey.py     a whole set     -> what it holds, survey_page.py as a page
check.py      prepared set    -> what is wrong with it
"""
