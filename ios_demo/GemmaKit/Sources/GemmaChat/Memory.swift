import Foundation

#if os(iOS)
import Darwin
import os

/// What the app holds, as the system counts it against the app's limit, and what it may still take.
func memoryLine() -> String {
    String(format: "app %.0f MB · free %.0f MB", Double(footprintBytes()) / 1e6, Double(os_proc_available_memory()) / 1e6)
}

private func footprintBytes() -> UInt64 {
    var found = task_vm_info_data_t()
    var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size)
    let status = withUnsafeMutablePointer(to: &found) { pointer in
        pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
            task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
        }
    }
    return status == KERN_SUCCESS ? found.phys_footprint : 0
}
#else
import GemmaKit

/// What the process held at most.
func memoryLine() -> String { String(format: "app %.0f MB", peakResidentBytes() / 1e6) }
#endif
