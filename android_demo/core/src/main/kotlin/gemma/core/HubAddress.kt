package gemma.core

import java.net.URLDecoder
import java.net.URLEncoder

/** A bundle on the Hugging Face hub: `hub:OWNER/NAME[@REVISION]` or its repository's page, as `gemma-runtime` takes it. */
data class HubAddress(val repository: String, val revision: String?) {
    /** The repository's name without its owner. */
    val name: String get() = repository.substringAfter('/')

    override fun toString(): String = "hub:$repository" + (revision?.let { "@$it" } ?: "")

    /** Where a file is at a branch, tag or commit. */
    internal fun url(origin: String, at: String, file: String): String =
        "$origin/$repository/resolve/${escaped(at)}/" + file.split('/').joinToString("/", transform = ::escaped)

    companion object {
        /** Throws DownloadException for a text that is no such address. */
        fun parse(text: String): HubAddress {
            val (place, revision) = text.trim().removePrefix("hub:").let { it.substringBefore('@') to it.substringAfter('@', "") }
            val address = if (HOST.find(place) != null) page(place) else HubAddress(place, null)
            if (address == null || !isRepository(address.repository)) {
                throw DownloadException("\"${text.trim().take(100)}\" is not a hub address; expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
            }
            return address.copy(revision = revision.ifEmpty { address.revision })
        }

        private fun page(text: String): HubAddress? {
            val path = text.replaceFirst(HOST, "").substringBefore('?').substringBefore('#').trim('/').split('/')
            if (path.size < 2 || path[0] == "datasets" || path[0] == "spaces") return null
            val rest = path.drop(2)
            val isReference = rest.getOrNull(1) == "refs" && rest.size == 4 // refs/pr/1
            if (rest.isNotEmpty() && (rest[0] != "tree" || !(rest.size == 2 || isReference))) return null
            val revision = rest.drop(1).joinToString("/")
            return try {
                HubAddress("${path[0]}/${path[1]}", URLDecoder.decode(revision.replace("+", "%2B"), "UTF-8").ifEmpty { null })
            } catch (_: IllegalArgumentException) {
                null
            }
        }

        private fun isRepository(text: String): Boolean =
            REPOSITORY.matches(text) && PATH_LIKE.none(text::endsWith) && "--" !in text && ".." !in text

        private val REPOSITORY = Regex("[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
        private val HOST = Regex("^(https?://)?(www\\.)?(huggingface\\.co|hf\\.co)/", RegexOption.IGNORE_CASE)
        private val PATH_LIKE = listOf(".gguf", ".safetensors", ".json", ".bin", ".pt")
    }
}

private fun escaped(part: String): String = URLEncoder.encode(part, "UTF-8").replace("+", "%20")
