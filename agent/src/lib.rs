//! slurm-vm's agent: the node role (VMs of the jobs on one node), the controller role (health and moves, once per
//! cluster), the shim and `svm`.
//!
//! Data flows one way: [`server`] and [`cluster`] take requests in, [`node`] knows which VM they are for, [`vm`] owns
//! each VM on a thread of its own, [`core`] decides, [`effects`], [`hypervisor`], [`slurm`], [`guest`] and [`peer`] act.
#![deny(unsafe_code)]

pub mod accounts;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod controller;
pub mod core;
pub mod effects;
pub mod guest;
pub mod hypervisor;
pub mod limits;
pub mod logging;
pub mod node;
pub mod peer;
pub mod server;
pub mod shim;
pub mod slurm;
pub mod text;
pub mod vm;
