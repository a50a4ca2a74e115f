# An engineer with Hugging Face directories and LLaVA JSON: plan, prepare, train on two processes, publish.
laver plan "$ROOT/examples/qwen2.5-7b-siglip2/stage2.yaml" --gpus 16 --gpu a100-80gb --top 3
laver train "$ROOT/examples/qwen2.5-7b-siglip2/stage2.yaml" --dry-run
laver parity --hf-path models/qwen
laver convert --hf-path models/qwen --save runs/converted
laver prepare --input llava/train.json --image-folder llava --format llava --workers 1 --output shards
laver prepare --output shards --workers 1 --check
laver train mine.yaml --dry-run
laver train mine.yaml --nproc-per-node 2 --tensor-model-parallel-size 2 --train-iters 3 --save runs/mine
laver train mine.yaml --nproc-per-node 2 --tensor-model-parallel-size 2 --train-iters 4 --save runs/mine --load runs/mine
laver inspect runs/mine
laver export --load runs/mine --save exported --form llava
laver chat --model exported --image llava/000_0.png --prompt "which digits are in row 1?" --max-new-tokens 4
laver export --load runs/mine --save decoder --decoder-only
laver chat --model decoder --prompt "which digits are in row 1?" --max-new-tokens 4
