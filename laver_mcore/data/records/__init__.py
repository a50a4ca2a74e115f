"""What a sample is, from every file format.

sources.py     a data set on disk, record by record where it lies (JSON, JSONL, parquet, shards)
sample.py      LLaVA and ShareGPT records -> Sample
finevision.py  FineVision's rows -> Sample
shards.py      prepared tar shards
"""
