"""A ladder of language models at equal multiply-adds for each word: figures 2 and 3 of the paper."""
