#!/usr/bin/env bash
# Selective on-policy distillation inside verl 0.9.1: an example for one node of 8 GPUs, 6 that train and 2 for
# the teacher. The settings were checked against verl's own config; the script was not run on GPUs (docs/verl.md).
#
#   STUDENT=path TEACHER=path DATA=folder recipes/verl/launch.sh [more=overrides]
#
# DATA holds train.parquet and test.parquet in verl's format, with a column "prompt" of chat messages.
set -euo pipefail
: "${STUDENT:?path of the student}" "${TEACHER:?path of the teacher}" "${DATA:?folder with train.parquet}"

# verl imports this in every process; that registers the trainer's mode and the losses.
export VERL_USE_EXTERNAL_MODULES=taopd.integrations.verl

settings=(
    # Our trainer, and what it selects; the block takes the keys of docs/verl.md.
    trainer.v1.trainer_mode=taopd_sync
    +trainer.v1.taopd_sync.selector=teachability
    +trainer.v1.taopd_sync.budget=0.1
    +trainer.v1.taopd_sync.score_top_k=16

    # verl's teacher sends its 32 best ids a token; the loss is KL(teacher || student) on them.
    distillation.enabled=true
    distillation.n_gpus_per_node=2
    distillation.nnodes=1
    distillation.teacher_models.teacher_model.model_path="$TEACHER"
    distillation.teacher_models.teacher_model.num_replicas=2
    distillation.teacher_models.teacher_model.inference.name=vllm
    distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=1
    distillation.distillation_loss.loss_mode=taopd_forward_kl_topk
    distillation.distillation_loss.topk=32
    distillation.distillation_loss.use_task_rewards=false
    distillation.distillation_loss.use_policy_gradient=false
    distillation.distillation_loss.loss_max_clamp=null

    # What the scores need of verl's own pass for the old log-probs.
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.model.use_fused_kernels=false
    actor_rollout_ref.model.use_remove_padding=true
    algorithm.rollout_correction.bypass_mode=false

    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.use_dynamic_bsz=true
    actor_rollout_ref.actor.ppo_mini_batch_size=96
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=1
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true
    data.train_files="$DATA/train.parquet"
    data.val_files="$DATA/test.parquet"
    data.train_batch_size=96
    data.max_prompt_length=1024
    data.max_response_length=4096
    trainer.n_gpus_per_node=6
    trainer.nnodes=1
    trainer.total_epochs=1
)

exec "${PYTHON:-python}" -m verl.trainer.main_ppo "${settings[@]}" "$@"
