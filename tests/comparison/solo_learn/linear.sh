python3 main_linear.py --config-path scripts/linear/imagenet-100 --config-name simclr.yaml backbone.name=resnet50 \
  pretrained_feature_extractor=trained_models/simclr/RUN/LAST.ckpt data.dataset=custom \
  data.train_path=photos/train data.val_path=photos/val data.format=image_folder
