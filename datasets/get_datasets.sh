#!/usr/bin/env bash
# Downloads CIFAR-10 (170 MB) and unpacks it to cifar-10-batches-py in the folder where this script is:
#
#     datasets/get_datasets.sh [URL]
#
# URL is another place to get cifar-10-python.tar.gz from: the official server is often slow, and the checksum
# makes any mirror safe. If it fails, run it again: it resumes. Intact data is left alone, damaged replaced.
set -eu

url=${1:-https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz}
archive=cifar-10-python.tar.gz
data=cifar-10-batches-py
# The official checksums, which torchvision uses too. Only the tests set others.
archive_md5="${CIFAR10_MD5:-c58f30108f718f92721af3b95e74349a} $archive"
files_md5=${CIFAR10_FILES_MD5:-'c99cafc152244af753f735de768cd75f data_batch_1
d4bba439e000b95fd0a9bffe97cbabec data_batch_2
54ebc095f3ab1f0389bbae665268c751 data_batch_3
634d18415352ddfa80567beed471001a data_batch_4
482c414d41f54cd18b22e5b47cb7c3cb data_batch_5
40351d587109b95175f43aff81a1287e test_batch
5ff9c542aee3614f3951f8cda6e48888 batches.meta'}

fail() { echo "get_datasets.sh: $1" >&2; exit 1; }

intact() {  # FOLDER LIST: whether each file of the list (lines of MD5 and name) is in the folder, undamaged
    while read -r md5 name; do
        [ -f "$1/$name" ] || return 1
        if command -v md5sum > /dev/null; then sum=$(md5sum < "$1/$name"); else sum=$(md5 -q "$1/$name"); fi
        [ "${sum%% *}" = "$md5" ] || return 1
    done <<EOF
$2
EOF
}

fetch() {  # one try, resuming; returns 33 if the server cannot resume, 8 or 22 after another HTTP error
    if [ -t 2 ]; then bar=--progress-bar; else bar=; fi
    if command -v curl > /dev/null; then
        code=$(curl --fail --location --show-error "${bar:---silent}" --continue-at - --output $archive \
            --connect-timeout 5 --speed-limit 1000 --speed-time 30 --write-out '%{http_code}' "$url") ||
            return $((code == 416 ? 33 : $?))
    elif command -v wget > /dev/null; then
        wget --no-verbose ${bar:+--show-progress} --continue --output-document=$archive --tries=1 \
            --dns-timeout=5 --connect-timeout=5 --read-timeout=30 "$url"
    else
        fail "curl or wget is needed: install one, or put $archive into $PWD yourself and run this again."
    fi
}

download() {
    for pause in 1 3 0; do
        if [ -s $archive ]; then resuming=yes; else resuming=; fi
        status=0
        fetch || status=$?
        case $status in
            0 | 33)
                if intact . "$archive_md5"; then return; fi
                rm -f $archive
                [ $resuming ] || fail "what $url sent has a wrong checksum and was deleted: try another URL."
                echo 'The partial download could not be resumed: starting over.' ;;
            8 | 22) break ;;
            *) echo "The transfer failed with exit status $status." >&2; sleep $pause ;;
        esac
    done
    [ -s $archive ] || rm -f $archive  # wget leaves an empty one
    fail "could not download $url (see above). Run this again to resume, give the URL of a mirror, or put \
$archive into $PWD yourself and run this again."
}

case "$# $url" in [01]\ *://*) ;; *) fail 'usage: datasets/get_datasets.sh [URL]' ;; esac
CDPATH='' cd -- "$(dirname -- "$0")"
if intact $data "$files_md5"; then
    echo "CIFAR-10 is already in $PWD/$data, complete and intact."
    exit
fi

trap 'rm -rf .unpacking' EXIT
trap 'exit 130' INT
if ! intact . "$archive_md5"; then
    echo "Downloading $url"
    download
fi

# Unpack elsewhere, check, swap: nobody sees half of the data, and damaged data stays until there is better.
rm -rf .unpacking
mkdir .unpacking
if ! tar -xzf $archive -C .unpacking || ! intact .unpacking/$data "$files_md5"; then
    fail "could not unpack $PWD/$archive, although its checksum is right: is the disk full?"
fi
if [ -e $data ] || [ -L $data ]; then mv $data .unpacking/damaged; fi
mv .unpacking/$data $data
rm $archive
echo "CIFAR-10 is in $PWD/$data."
