"""lm-eval-harness with one model more, "slope": all else is the harness's own command line.

    python tools/lm_eval.py --model slope --model_args path=runs/tiny --tasks lambada_openai
    python tools/lm_eval.py --model slope --model_args path=converted,dtype=bf16,device=cuda --tasks my_task \\
        --include_path my_tasks --batch_size 16

path is a checkpoint, a run folder (its newest checkpoint that verifies), or a folder that tools/convert_checkpoint.py
wrote. Other model arguments: tokenizer, dtype (fp32, bf16, fp16), device (cpu, cuda), batch_size, seed (of tasks that
draw). The harness looks for a GPU where no device is named. Tasks come from the harness, whose data are downloaded, or
from the YAML files in the folder of --include_path.

It needs the extra "evaluation": pip install -c constraints.txt -e '.[evaluation]'
"""

from __future__ import annotations

import os
import sys

from slope_dist.command_line import answer


def work() -> None:
    """Hand over to the harness."""
    from slope_dist.inference.harness import command_line

    command_line()


def main() -> int:
    """Run the harness on `sys.argv` and return the exit code."""
    return answer(work)


if __name__ == "__main__":
    # The harness imports packages that are called as two files beside this one: lm_eval, and evaluate.
    # Links are followed, since Python has done so with the folder that it puts first.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path = [path for path in sys.path if os.path.realpath(path) != here]
    sys.exit(main())
