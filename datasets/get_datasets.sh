#!/usr/bin/env bash
# Downloads CIFAR-10 (170 MB) and unpacks it to cifar-10-batches-py in the folder where this script is:
#
#     datasets/get_datasets.sh [URL]
#
# URL is another place to get cifar-10-python.tar.gz from: the official server is often slow, and the checksum makes
# any mirror safe. If it fails, run it again: it resumes. A folder that is there is left alone.
set -eu

url=${1:-https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz}
archive=cifar-10-python.tar.gz
data=cifar-10-batches-py
md5=${CIFAR10_MD5:-c58f30108f718f92721af3b95e74349a}  # the official one; only the tests set another

fail() { echo "get_datasets.sh: $1" >&2; exit 1; }

intact() {
    [ -f $archive ] || return 1
    if command -v md5sum > /dev/null; then sum=$(md5sum < $archive); else sum=$(md5 -q $archive); fi
    [ "${sum%% *}" = "$md5" ]
}

fetch() {  # one try, resuming; an HTTP error returns 22 or 8, but 33 if it is that the server cannot resume
    if [ -t 2 ]; then bar=--progress-bar; else bar=; fi
    if command -v curl > /dev/null; then
        code=$(curl --fail --location --show-error "${bar:---silent}" --continue-at - --output $archive \
            --connect-timeout 5 --speed-limit 1000 --speed-time 30 --write-out '%{http_code}' "$url") ||
            return $((code == 416 ? 33 : $?))
    elif command -v wget > /dev/null; then
        wget --no-verbose ${bar:+--show-progress} --continue --output-document=$archive --tries=1 \
            --timeout=5 --read-timeout=30 --no-http-keep-alive "$url"  # else a redirect by HTTP/1.0 may fail
    else
        fail "curl or wget is needed: install one, or put $archive into $PWD yourself and run this again."
    fi
}

case "$# $url" in [01]\ *://*) ;; *) fail 'usage: datasets/get_datasets.sh [URL]' ;; esac
CDPATH='' cd -- "$(dirname -- "$0")"
if [ -e $data ]; then
    echo "CIFAR-10 is already in $PWD/$data. If it is damaged, delete that folder and run this again."
    exit
fi
for pause in 1 3 0; do  # curl --retry would forget what it has, and gives up a transfer that breaks off
    if intact; then break; fi
    if [ -s $archive ]; then resuming=yes; else resuming=; fi
    status=0; fetch || status=$?
    case $status in
        0 | 33)
            if intact; then break; fi
            rm -f $archive
            [ $resuming ] || fail "what $url sent has a wrong checksum and was deleted: try another URL."
            echo 'The partial download could not be resumed: starting over.' ;;
        8 | 22) break ;;
        *) sleep $pause ;;
    esac
done
[ -s $archive ] || rm -f $archive  # wget leaves an empty one
intact || fail "could not download $url (see above). Run this again to resume, give the URL of a mirror, or put \
$archive into $PWD yourself and run this again."

trap 'rm -rf .unpacking' EXIT  # unpacked elsewhere, then moved: a folder that is there is whole
trap 'exit 130' INT
rm -rf .unpacking
mkdir .unpacking
tar -xzof $archive -C .unpacking && mv .unpacking/$data $data ||
    fail "could not unpack $PWD/$archive, although its checksum is right: is the disk full?"
rm $archive
echo "CIFAR-10 is in $PWD/$data."
