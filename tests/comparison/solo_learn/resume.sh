python3 main_pretrain.py --config-path scripts/pretrain/imagenet-100 --config-name simclr.yaml backbone.name=resnet50 \
  data.dataset=custom data.train_path=photos/train data.val_path=photos/val data.format=image_folder
