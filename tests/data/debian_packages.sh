# Fetches and installs Debian packages. Other scripts source this file.

# debian_packages FOLDER SUITE ARCHITECTURE TAR_ARGUMENTS NAME…
# Unpacks the packages into FOLDER, from the mirror that apt uses here. Does nothing if FOLDER exists.
# apt's messages go to stderr.
debian_packages() {
    [ -d "$1" ] && return
    local folder=$1 suite=$2 architecture=$3 selection stage mirror
    read -ra selection <<<"$4"
    shift 4
    stage=$(mktemp -d -p "$(dirname "$folder")")
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(SITE)' | sed -n 1p) && [ -n "$mirror" ] || return 1
    mkdir -p "$stage/lists/partial" "$stage/archives/partial" "$stage/root"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$stage/sources.list"
    local options=(-qq -o "Dir::Etc::sourcelist=$stage/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$stage/lists" -o "Dir::Cache=$stage" -o Dir::State::status=/dev/null
        -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture"
        -o Acquire::Languages=none -o APT::Sandbox::User=root)
    (cd "$stage" && apt-get "${options[@]}" update && apt-get "${options[@]}" download "$@" \
        && for package in *.deb; do
            dpkg-deb --fsys-tarfile "$package" | tar x -C root "${selection[@]}" || exit 1
        done) >&2 || { rm -rf "$stage"; return 1; }
    mv -T "$stage/root" "$folder" || [ -d "$folder" ] # a parallel run may have created it
    rm -rf "$stage"
}

# install_packages NAME…: onto this machine, as root. Lanes that run at once wait for each other.
install_packages() {
    (
        flock 9
        apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"
    ) 9>"${TMPDIR:-/tmp}/gemma-export-apt.lock"
}
