"""Take a step of ViCToR and of VIRAL and keep what entered the decoder: `methods_worker.py FOLDER VICTOR VIRAL`.

FOLDER/probe.json holds the lengths of visual tokens, FOLDER/targets.pt the pixels and features of one micro-batch.
"""

import json
import sys
import warnings
from pathlib import Path


def main(folder: Path, commands: dict[str, str]) -> None:
    warnings.filterwarnings("ignore")
    import torch
    from accounting_worker import first_step

    from laver_mcore.megatron import parallel
    from laver_mcore.train.step import train_step

    device, lengths = parallel.init_distributed(timeout_minutes=2), {}
    for method, command in commands.items():
        engine, batches = first_step(command.split(), device)
        seen, enter = [], engine.objective.enter

        def record(visual_ND, plan, enter=enter, seen=seen):
            entering = enter(visual_ND, plan)
            seen.append((visual_ND.detach(), plan, entering))
            return entering

        engine.objective.enter = record
        tapped, leaving = watch(engine)
        train_step(engine, batches, 0)
        lengths[method] = torch.cat([visual.norm(dim=-1) for visual, _, _ in seen]).tolist()
        if method == "viral":
            batch, (_, plan, entering) = next(
                (b, s) for b, s in zip(batches, seen, strict=True) if b.image_grids
            )
            key, index = batch.image_keys[0]
            width = engine.config.objective.width(engine.config)
            torch.save([b.visual_rows_N for b in batches], folder / "rows.pt")
            found = dict(
                pixels=plan.targets,
                targets=entering.travelling[0][:, :width],
                image=f"{key.removeprefix('sample-')}_{index}.png",
            )
            torch.save(found, folder / "targets.pt")
            states = [torch.cat([one[k] for one in tapped]) for k in (1, 2)]
            torch.save(dict(tapped=states, leaving=leaving), folder / "states.pt")
    (folder / "probe.json").write_text(json.dumps(lengths))
    parallel.shut_down()


def watch(engine) -> tuple[list, dict]:
    """What travels to the losses of every micro-batch, and what leaves every layer, [T, D] of all micro-batches."""
    tapped, leaving, sums = [], {}, engine.objective.sums

    def keep(module, _, output):
        hidden = output[0] if isinstance(output, tuple) else output
        leaving.setdefault(module.layer_number, []).append(hidden[:, 0].detach())

    def seen(output, plan):
        tapped.append([rows.detach() for rows in output.travelling])
        return sums(output, plan)

    for layer in engine.chunks[0].decoder.layers:
        layer.register_forward_hook(keep)
    engine.objective.sums = seen
    return tapped, leaving


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"victor": sys.argv[2], "viral": sys.argv[3]})
