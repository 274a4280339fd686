//! Two devices of a daemon in this process that do not reach each other.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::{all_on, assert_exact, places};
use crate::common::lane::Lane;
use crate::common::{folder, keys};
use terrace_client::wire::{GrantOutcome, HbmActivity, InfoRequest, LeaseKind, Tier};
use terrace_core::{ByteCount, Core};
use terrace_gpudirect::{Device, Fault, HostOnly};
use terrace_media::Hooks;
use terraced::{Config, Daemon, HbmDevice};

const TWO: &str = "persist_delay_ms = 3600000\n\
    [[hbm]]\ndevice = \"host-only:0\"\nbytes = \"8MiB\"\n\
    [[hbm]]\ndevice = \"host-only:1\"\nbytes = \"8MiB\"\n";

async fn start(folder: &Path) -> (Daemon, Vec<Arc<HostOnly>>) {
    let path = crate::common::config(folder, TWO);
    let made: Arc<Mutex<Vec<Arc<HostOnly>>>> = Arc::default();
    let given = made.clone();
    let open = move |configured: &HbmDevice| {
        let mut made = given.lock().unwrap();
        let ordinal = u32::try_from(made.len()).unwrap();
        let device = Arc::new(HostOnly::new(ordinal, ByteCount::new(configured.bytes.get()))?.alone());
        made.push(device.clone());
        Ok(device as Arc<dyn Device>)
    };
    let daemon =
        Daemon::start_on(Config::read(&path).unwrap(), Hooks::default(), Arc::new(open)).await.unwrap();
    let devices = std::mem::take(&mut *made.lock().unwrap());
    (daemon, devices)
}

/// What each device does.
async fn activities(daemon: &Daemon) -> Vec<HbmActivity> {
    let mut admin = terrace_client::admin(&daemon.grpc.to_string()).await.unwrap();
    let tiers = admin.info(InfoRequest {}).await.unwrap().into_inner().tiers.into_iter();
    let devices = tiers.filter(|tier| tier.tier() == Tier::Hbm);
    devices.map(|device| device.activity.unwrap()).collect()
}

/// Bytes that each device has copied.
async fn copied(daemon: &Daemon) -> Vec<u64> {
    activities(daemon).await.iter().map(|activity| activity.copied_bytes_total).collect()
}

/// A block of one device is wanted on another that it does not reach. One of them could be given memory that it cannot
/// read, or a block could be told to be there after the first half of its way: it must come through the host, by a copy
/// of each device, with its bytes. A failure in either half must cost that attempt alone.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_through_the_host_between_devices_apart() {
    let folder = folder();
    let (daemon, devices) = start(folder.path()).await;
    assert!(!devices[0].reaches(devices[1].info()) && !devices[1].reaches(devices[0].info()));
    let names = keys(6);
    let block = 256 << 10;
    let mut first = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = first.write(&names).await;
    assert!(all_on(&written, 0), "{:?}", places(&written));
    first.release(written.lease).await;
    let mut second = Lane::on_device(folder.path(), 1).await;
    for (half, number) in devices.iter().zip(0..) {
        half.inject(Fault::FailedCopy);
        let one = second.lease_within(LeaseKind::Read, &names[..1], 300).await;
        // Not there, or by another attempt: never other bytes.
        if one.blocks.iter().all(|grant| grant.outcome() == GrantOutcome::Granted) {
            assert_exact(&mut second, &one, &names[..1]).await;
            second.release(one.lease).await;
        }
        let failed = activities(&daemon).await[number].copies_failed_total;
        assert_eq!(failed, 1, "the fault of device {number} did not strike");
    }
    let before = copied(&daemon).await;
    let read = second.lease(LeaseKind::Read, &names[1..]).await;
    assert!(all_on(&read, 1), "{:?}", places(&read));
    assert_exact(&mut second, &read, &names[1..]).await;
    let after = copied(&daemon).await;
    let moved: Vec<_> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_eq!(moved, [5 * block, 5 * block], "they came by another way");
    drop((first, second));
    daemon.engine().view(Core::check);
    daemon.stop().await;
}
