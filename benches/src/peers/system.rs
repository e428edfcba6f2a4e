//! The host's own `malloc`.

use std::alloc::System;

use super::{Kind, Peer, calls_of, no_entry, nothing};

static SYSTEM: System = System;

pub(super) const PEER: Peer = Peer {
    name: "system",
    about: "the host's malloc",
    kind: Kind::Peer,
    calls: calls_of!(SYSTEM),
    open: nothing,
    enter: no_entry,
    provider_cost: None,
    describe: None,
    program: None,
};
