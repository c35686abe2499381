"""Write a job as a FLARE job folder that plain FLARE tools run or submit.

    python scripts/generate_nvflare_job.py --output esm2-job --num-clients 2
    python scripts/generate_nvflare_job.py --output job --num-clients 2 --train-script train.py --initial-ckpt start.pt

It is `sfl export`; `--help` says the rest.
"""

import sys

from sfl.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
