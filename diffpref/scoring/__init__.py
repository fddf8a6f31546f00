"""diffpref score: pictures from files, folders, tables, shards or standard input -> a table of scores.

    sources.py, tables.py, shards.py   where pictures lie        -> Item
    prompts.py                         which prompt goes with it -> Item with a prompt
    judging.py                         every scorer, one decode  -> row
    unfinished.py                      rows on disk as they come, taken up again where a run broke off
    outputs.py                         parquet, CSV or JSON lines out of them
    summary.py                         what is said at the end

Memory holds names, prompts and a bounded number of pictures ahead, never the pictures of a folder.
"""
