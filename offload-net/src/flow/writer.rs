//! The thread that writes the flow log: a JSON object per line.
//!
//! The file is opened anew for each table, so that whoever moves it away (logrotate) needs to tell nobody.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{SystemTime, UNIX_EPOCH};

use offload_card::limit::LogLimit;
use proto::error::{Error, ErrorReason};
use proto::v1::NetDrops;
use tonic::Code;

use super::{Action, Direction, Flow, Full, Key, Settings, Table};

/// Starts the thread, once it is known that the file can be written.
pub(super) fn start(settings: Arc<Settings>) -> Result<Sender<Full>, Error> {
    let path = settings.file.display().to_string();
    open(&settings.file).map_err(|e| {
        let code = match e.kind() {
            io::ErrorKind::PermissionDenied => Code::PermissionDenied,
            _ => Code::FailedPrecondition,
        };
        Error::new(code, ErrorReason::Host, format!("cannot write the flow log {path}: {e}"))
            .resource(&path)
            .remedy("name a file in a directory that the network card's user may write to, e.g. its LogsDirectory=")
    })?;
    let (sender, tables) = mpsc::channel();
    std::thread::Builder::new().name("flow-log".into()).spawn(move || run(&settings, &tables)).map_err(
        |e| {
            Error::new(Code::ResourceExhausted, ErrorReason::Host, format!("no thread for the flow log: {e}"))
                .remedy("raise the service's limit on tasks")
        },
    )?;
    Ok(sender)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

fn run(settings: &Settings, tables: &Receiver<Full>) {
    let log = LogLimit::default();
    // Packets that are in no line because the file could not be written.
    let mut unwritten = 0;
    while let Ok(Full { network, mut table, back }) = tables.recv() {
        table.lost += std::mem::take(&mut unwritten);
        if let Err(e) = write(settings, &network, &table) {
            unwritten = table.lost + table.flows.values().map(|f| f.packets).sum::<u64>();
            log.say(|left_out| {
                tracing::error!("cannot write the flow log {}: {e}{left_out}", settings.file.display());
            });
        }
        table.flows.clear();
        table.lost = 0;
        // The network may be gone.
        let _ = back.send(table);
    }
}

fn write(settings: &Settings, network: &str, table: &Table) -> io::Result<()> {
    let mut out = BufWriter::new(open(&settings.file)?);
    for (key, flow) in &table.flows {
        line(&mut out, network, settings.sample, key, flow)?;
    }
    if table.lost > 0 {
        let now_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        writeln!(out, "{{\"network\":\"{network}\",\"end_us\":{now_us},\"lost_packets\":{}}}", table.lost)?;
    }
    out.flush()
}

/// One flow. Nothing in it needs quoting: networks' ids are letters, digits and '-'.
fn line(out: &mut impl Write, network: &str, sample: u32, key: &Key, flow: &Flow) -> io::Result<()> {
    let Key { device, direction, action, source, destination, protocol, ports } = key;
    let Flow { first_us, last_us, packets, bytes } = flow;
    let direction = match direction {
        Direction::Out => "out",
        Direction::In => "in",
    };
    write!(
        out,
        "{{\"network\":\"{network}\",\"mac\":\"{device}\",\"direction\":\"{direction}\",\
         \"start_us\":{first_us},\"end_us\":{last_us},\"source\":\"{source}\",\"destination\":\"{destination}\",\
         \"protocol\":{protocol},\"source_port\":{},\"destination_port\":{},\"packets\":{packets},\"bytes\":{bytes}",
        ports.0, ports.1
    )?;
    if sample > 1 {
        write!(out, ",\"sample\":{sample}")?;
    }
    match action {
        Action::Accept => writeln!(out, ",\"action\":\"accept\"}}"),
        Action::Limited => writeln!(out, ",\"action\":\"reject\",\"reason\":\"allowance_exceeded\"}}"),
        Action::Reject(reason) => {
            // Reasons are in the order of the message.
            let names = NetDrops::default().by_reason();
            let name = names.get(*reason as usize).map_or("", |(name, _)| name);
            writeln!(out, ",\"action\":\"reject\",\"reason\":\"{name}\"}}")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::drops::DropReason;
    use crate::mac::MacAddr;

    #[test]
    fn a_table_becomes_lines_and_comes_back_empty() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("flows");
        let settings = Settings { file: file.clone(), interval: Duration::from_secs(1), sample: 10 };
        let tables = start(Arc::new(settings)).unwrap();
        let key = Key {
            device: MacAddr([2, 0, 0, 0, 0, 1]),
            direction: Direction::Out,
            action: Action::Reject(DropReason::SpoofedAddress),
            source: [10, 0, 0, 1].into(),
            destination: "fd00::1".parse().unwrap(),
            protocol: 17,
            ports: (5, 6),
        };
        let (back, returned) = mpsc::channel();
        for lost in [0, 7] {
            let mut table = Table::new();
            table.add(key, (1, 60), 1_000_000);
            table.add(key, (2, 120), 2_000_000);
            table.lost = lost;
            tables.send(Full { network: "lan".into(), table, back: back.clone() }).unwrap();
            let table = returned.recv_timeout(Duration::from_secs(10)).unwrap();
            assert!(table.is_empty());
        }
        let text = std::fs::read_to_string(file).unwrap();
        let flow = "{\"network\":\"lan\",\"mac\":\"02:00:00:00:00:01\",\"direction\":\"out\",\"start_us\":1000000,\
                    \"end_us\":2000000,\"source\":\"10.0.0.1\",\"destination\":\"fd00::1\",\"protocol\":17,\
                    \"source_port\":5,\"destination_port\":6,\"packets\":3,\"bytes\":180,\"sample\":10,\
                    \"action\":\"reject\",\"reason\":\"spoofed_address\"}";
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..2], [flow, flow]);
        assert!(lines.len() == 3 && lines[2].ends_with("\"lost_packets\":7}"), "{text}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let file = "/nonexistent/flows".into();
        let settings = Settings { file, interval: Duration::from_secs(1), sample: 1 };
        let e = start(Arc::new(settings)).err().unwrap();
        assert!(e.message().contains("/nonexistent/flows") && e.fact("remedy").is_some(), "{e}");
    }
}
