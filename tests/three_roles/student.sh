# A student with a laptop: real pages, two stages, a look at what happened, a model to talk to.
python "$ROOT/tools/prepare_demo.py" --output data/demo --pages 64 --heldout 8
laver train "$ROOT/examples/demo/stage1.yaml" --train-iters 4 --save-interval 2 --save runs/first
laver train "$ROOT/examples/demo/stage1.yaml" --train-iters 6 --save runs/first --load runs/first
laver inspect runs/first
laver train "$ROOT/examples/demo/stage2.yaml" --train-iters 4 --pretrained-checkpoint runs/first --save runs/laver
laver report runs/laver runs/first
laver inspect-data runs/laver/config.yaml --step 3 --output step.html
laver answer --checkpoint runs/laver --data data/demo/heldout.json --max-new-tokens 4
laver diagnose --model runs/laver --data data/demo/heldout.json --num-questions 2 --output diagnosis
laver export --load runs/laver --save exported
laver chat --model exported --trust-remote-code --image data/demo/images/heldout/00000.jpg --prompt "Which digits are in row 1?" --max-new-tokens 4
