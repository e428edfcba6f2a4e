//! The heap on the host: threads play CPUs, signals play interrupts. One file for each kind of behaviour.

mod common;
mod nested;
mod promises;
mod stress;
