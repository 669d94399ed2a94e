from cogvideo.cli import main

main()
