"""`python -m rlt_retrieval`, also for `torchrun -m rlt_retrieval train …`."""

from rlt_retrieval.cli import main

main()
