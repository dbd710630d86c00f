"""What a block costs on the host against eager's layers; prints JSON. Run by test_block_host.py."""

import json
import sys

import torch
from support.ahead_of_time import stand_in_driver
from support.host_time import block_rows, block_steps, kernels_taken


def main() -> None:
    torch.set_num_threads(1)
    with stand_in_driver(90) as launches, kernels_taken():
        step = block_steps(1, backward=True)["fastnn"]
        step()
        launches.clear()
        step()
        kernels = [launch.kernel for launch in launches]
        rows = [row for row in block_rows(launches) if row["implementation"] == "fastnn"]
    ratios = {f"{row['figure']}: {row['case']}": 1 / row["ratios"]["eager"] for row in rows}
    json.dump({"ratios": ratios, "kernels": kernels}, sys.stdout)


if __name__ == "__main__":
    main()
