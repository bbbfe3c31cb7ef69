# The options of Detectron2's configs/common/train.py, for an epoch of COCO at a time:
# 118,287 images, empty ones included, batch size 16, are 7393 iterations.
train = dict(
    output_dir="./output",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=12 * 7393,
    epochs=None,
    reference_batch=16,
    accumulate=1,
    non_finite="stop",
    amp=dict(enabled=False, dtype="bfloat16"),
    ema=dict(enabled=False, decay=0.9999),
    fsdp=False,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=7393, max_to_keep=100),
    eval_period=7393,
    best_metric="bbox/AP",
    patience=0,
    log_period=20,
    wandb_project="",
    device="cuda",
    cudnn_benchmark=False,
    seed=-1,
)
