# For .ci/msrv and .ci/i686, from the top of the repository: Debian's compiler of the version that Cargo.toml declares.
# It is unpacked below target/msrv, with the libraries that it needs; nothing is installed.

version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
packages=$PWD/target/msrv/packages
root=$PWD/target/msrv/root
# What that compiler is run with.
libraries=$root/usr/lib/x86_64-linux-gnu:$root/usr/lib

# Downloads packages, by the apt that the environment configures, and unpacks them.
unpack() {
    mkdir -p "$packages" "$root"
    chmod 777 "$packages"
    local package
    for package in "$@"; do
        rm -f "$packages"/*.deb
        (cd "$packages" && apt-get download -q "$package") || return 1
        dpkg -x "$packages"/*.deb "$root" || return 1
    done
}

# Debian's name for the version.
full_version() { apt-cache madison rustc-web | awk -v version="$version." 'index($3, version) == 1 { print $3; exit }'; }

unpack_compiler() {
    local full llvm
    [ ! -x "$root/usr/bin/rustc" ] || return 0
    full=$(full_version)
    [ -n "$full" ] || return 1
    llvm=$(apt-cache show "libstd-rust-web-$version=$full" | grep -o 'libllvm[0-9]*' | head -n 1)
    unpack "libstd-rust-web-dev=$full" "libstd-rust-web-$version=$full" "$llvm" "rustc-web=$full"
}
