"""What a sample is, from every file format.

sources.py          a data set on disk, record by record where it lies (JSON, JSONL, parquet, shards)
json_file.py        JSON and JSONL files -> decoded records
conversation.py     LLaVA, ShareGPT, OpenAI, Qwen-VL and ms-swift records -> Sample
image_reference.py  how a record names an image
finevision.py       FineVision's rows -> Sample
shards.py           prepared tar shards
sample.py           Sample and Turn
values.py           which fields say something
"""
